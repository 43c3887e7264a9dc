"""Make `ringserve/v1` from the .proto files beside this script: `python api/proto/generate.py [OUT]`.

The result is committed, so that nobody who installs ringserve needs a compiler; a test holds it to the sources.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

SOURCES = Path(__file__).parent
ROOT = SOURCES.parent.parent


def generate(out: Path) -> None:
    files = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.glob("ringserve/v1/*.proto"))
    well_known = Path(protoc.__file__).parent / "_proto"
    failed = protoc.main(["protoc", f"--proto_path={SOURCES}", f"--proto_path={well_known}", f"--python_out={out}",
                          f"--pyi_out={out}", f"--grpc_python_out={out}", *files])
    if failed:
        raise SystemExit("the .proto files do not compile")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
