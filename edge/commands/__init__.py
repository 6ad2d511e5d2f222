"""One thin file per `kizu` subcommand; each loads what it needs only when it is called."""
