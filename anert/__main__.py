"""`python -m anert`: the same as the `anert` command."""

from anert.cli import entry

if __name__ == "__main__":
    entry()
