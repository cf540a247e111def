"""Run a generated program where it can do no harm, and learn whether it passes its tests: `distill.tasks.sandbox.programs`."""
