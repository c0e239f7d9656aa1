"""The commands: one file per subcommand; `main` puts them together."""
