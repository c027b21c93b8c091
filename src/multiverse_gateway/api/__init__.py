"""The JSON API for programs: everything over HTTP except inference and pages."""
