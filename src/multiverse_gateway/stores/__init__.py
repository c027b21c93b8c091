"""One file for each place where the registry can live."""
