"""Contract suites for authors of plug-ins: subclass one, give it a fixture, and pytest runs it against your part."""
