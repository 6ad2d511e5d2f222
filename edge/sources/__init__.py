"""Where frames come from: ZeroMQ cameras, folders, video."""
