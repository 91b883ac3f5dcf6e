"""Creates the site's tables where they are missing: ``python -m examples.site.setup``, once per deployment."""

from .app import engine
from .models import Base


def main() -> None:
    """Create what is missing."""
    Base.metadata.create_all(engine)


if __name__ == "__main__":
    main()
