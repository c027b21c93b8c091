"""The settings: one frozen value, made from a TOML file, `.env`, the environment and command-line flags.

1. Later sources win: `multiverse.toml`, `.env`, environment, flags. In one source `MULTIVERSE_PORT` wins over `PORT`.
2. A value that cannot work stops the start. So does an unknown name with our prefix, because it is a misspelling.
3. Secrets never show in `repr`, in error messages or in `Settings.masked()`.
"""

from multiverse_gateway.settings.checks import SettingsError
from multiverse_gateway.settings.declaration import Settings
from multiverse_gateway.settings.sources import load_settings

__all__ = ["Settings", "SettingsError", "load_settings"]
