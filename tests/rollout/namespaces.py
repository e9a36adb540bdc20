"""Whether this machine can confine a program at all."""

import ctypes
import os
import subprocess
import sys


def kernel_has_namespaces() -> bool:
    """Asked of util-linux and the kernel, not of the code that is tested."""
    if sys.platform != "linux" or ctypes.CDLL(None).syscall(444, None, 0, 1) < 1:
        return False
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return subprocess.run(["unshare", *user, "--mount", "--pid", "--net", "--fork", "true"], check=False).returncode == 0
