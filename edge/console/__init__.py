"""The operator's page: a subscriber like any other, in a process of its own."""
