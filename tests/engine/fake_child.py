"""A child with the fake engine: which engine a child has is said here, never on the wire."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engineroom.engine.child import main
from tests.engine.fake import fake_engine

if __name__ == "__main__":
    main(fake_engine)
