"""``python -m raygrpo``."""

from raygrpo.cli import main

if __name__ == "__main__":
    main()
