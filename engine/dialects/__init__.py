"""How models write tool calls and reasoning in their text: pure, by the standard library alone."""
