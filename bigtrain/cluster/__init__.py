"""Where a run's processes live: started, watched, signalled and ended, without importing torch.

    local.launch ─ agent ─┬─ fork_client ══ socket ══ fork_server ─┬─ rank   (one per process)
                          └─ supervisor  ══ pipes  ═══════════════ └─ store  (one per run)

The agent lives in the `bigtrain launch` process. One server per node imports the heavy modules
once and forks every rank; each rank is handed over to the agent as its own child, so that exit
codes, signals and deaths are the kernel's word and not a message that may be lost.
"""
