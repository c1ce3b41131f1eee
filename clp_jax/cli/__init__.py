"""The command `clp`: one thin file a command."""
