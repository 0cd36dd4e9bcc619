"""One file a command of the command line: parse, call, print. The work is elsewhere, and imported when one runs."""
