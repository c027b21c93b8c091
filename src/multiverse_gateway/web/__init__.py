"""Everything that speaks to people and programs over HTTP, except for inference itself."""
