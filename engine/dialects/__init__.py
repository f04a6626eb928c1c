"""How models write tool calls and reasoning in their text: pure, no I/O, the standard library alone."""
