"""The commands: one file per subcommand; `main` puts them together.

What image tools share: `quick_start.py` starts them, `interruption.py` is how signals end them, `streams.py` is
standard output that may not be there, `tool_log.py`, `trace_option.py` and `option_reader.py` say and read what QEMU's
tools do. `signals.py` is how a daemon hears them.
"""
