"""The rules that decide whether a request comes in, the same for both doors, the admin API and the pages. It knows no web framework."""
