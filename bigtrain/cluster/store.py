"""The key-value store through which ranks find each other, in a process of its own.

The agent has bound the port before any rank starts, so there is no race for it, and the process
leaves after the last rank, so that no rank ever speaks to a store that is gone.
"""

from __future__ import annotations

import os


def serve(*, host: str, port: int, listener: int, life: int) -> None:
    """Serve on the bound socket `listener` until the pipe `life` ends. Never returns."""
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener
    )
    os.read(life, 1)
    del store
    os._exit(0)  # nothing of the modules that the fork server imported was used here
