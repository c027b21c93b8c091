# shellcheck shell=bash
# Sourced by the scripts beside it: `environment DIRECTORY WHAT...` makes a virtual environment that holds what pip is told
# to install, and makes it again when pyproject.toml changes.

environment() {
  local directory=$1 python=${PYTHON:-python3} wanted
  shift
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "Python 3.11 or newer is needed; set PYTHON to its path (now: $python)." >&2
    return 1
  }
  "$python" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "This Python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
    return 1
  }
  wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(b"|".join([open("pyproject.toml", "rb").read(), *map(str.encode, sys.argv[1:])])).hexdigest())' "$@" "$("$python" --version)")
  [ "$(cat "$directory/made-for" 2>/dev/null)" = "$wanted" ] && return
  echo "Preparing $directory ..." >&2
  "$python" -m venv --clear "$directory"
  "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'  # knows --group
  if command -v uv >/dev/null; then # does the same in a tenth of the time
    uv pip install --quiet --compile-bytecode --python "$directory/bin/python" "$@"
  else
    "$directory/bin/python" -m pip install --quiet "$@"
  fi
  echo "$wanted" >"$directory/made-for"
}
