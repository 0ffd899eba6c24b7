"""Programs that measure this package, and what they measured."""
