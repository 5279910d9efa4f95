"""Policy servers as processes, for the tests."""

import contextlib
import json
import subprocess
import sys

from helpers import ROOT


@contextlib.contextmanager
def policy_server(port=0, **options):
    """Yield the address of tests/policy_server.py, running."""
    script = ROOT / "tests" / "policy_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(port), json.dumps(options)], stdout=subprocess.PIPE
    )
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
