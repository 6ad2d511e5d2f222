"""Where events go: the SQLite event log and the ZeroMQ publisher."""
