"""Limits of the machine (memory bandwidth, arithmetic) and targets, with which the benchmarks are compared."""

from __future__ import annotations

from bench.report.results import Results
from bench.report.text import ms, table, times


def limits_of(results: Results) -> list[dict[str, float]]:
    """For each number of threads the fastest that any file has seen."""
    found: dict[float, dict[str, float]] = {}
    published = {row["threads"] for row in results.rows}
    for limit in (x for file in results.files for x in file["limits"] if x["threads"] in published):
        best = found.setdefault(limit["threads"], dict(limit))
        best.update({key: max(value, best[key]) for key, value in limit.items()})
    return [found[threads] for threads in sorted(found)]


def limits_table(results: Results) -> str:
    return table(
        ("threads", "copy, read + write", "float32 arithmetic (matrix product)"),
        (
            (str(x["threads"]), f"{x['copy_bytes_per_s'] / 1e9:.1f} GB/s", f"{x['flop_per_s'] / 1e9:.0f} GFLOP/s")
            for x in limits_of(results)
        ),
    )


H100_COPY = 3.0e12  # bytes a second, read and write
H100_ISSUE = 132 * 128 * 1.755e9  # operations a second, one issue slot each


def floors_table(results: Results) -> str:
    """The least time of each part: bytes over a copy's, comparisons over arithmetic's. Nothing here is a timing."""
    one_thread = limits_of(results)[0]
    rows = []
    for what, size, count in (
        ("loss, 128 x 100, float32", 2 * 128 * 100 * 4, 0),
        ("loss, 64 x 1,000, float32", 2 * 64 * 1000 * 4, 0),
        ("loss, 16,384 x 1,000, bfloat16", 2 * 16_384 * 1000 * 2, 0),
        ("loss, 4,096 x 21,841, bfloat16", 2 * 4096 * 21_841 * 2, 0),
        ("loss, 4,096 x 131,072, bfloat16", 2 * 4096 * 131_072 * 2, 0),
        ("statistics, 256 x 2,048, float32", 256 * 2048 * 4, 0),
        ("brute force, 256 queries x 880,880 entries", 8 * 880_880, 6 * 256 * 880_880),
    ):
        cpu = max(size / one_thread["copy_bytes_per_s"], count / one_thread["flop_per_s"])
        gpu = max(size / H100_COPY, count / H100_ISSUE)
        rows.append(
            (what, f"{size / 1e6:,.2f} MB", f"{count / 1e9:,.2f} G" if count else "–", ms(cpu * 1e3), ms(gpu * 1e3))
        )
    return table(("part", "bytes", "operations", "this CPU, 1 thread", "H100"), rows)


def targets_table(results: Results) -> str:
    """Targets on CPUs and whether they are met."""
    rows: list[tuple[str, ...]] = []

    def judge(what: str, limit: str, got: str, met: bool | None) -> None:
        rows.append((what, limit, got, "not measured" if met is None else "yes" if met else "**no**"))

    for size, factor in (((128, 100, 64, 30_000), 100), ((64, 1000, 2048, 880_880), 300)):
        for threads in (1, 2):
            facts = {**dict(zip("BCDN", size, strict=True)), "threads": threads, "layer": False}
            slow = results.one("step", peer="list_queue", **facts)
            for peer, way in (("released_direct", "direct"), ("released", "by autograd")):
                fast = results.one("step", peer=peer, **facts)
                where = f"step at {', '.join(f'{n:,}' for n in size)}, threads {threads}, {way}"
                if slow is None or fast is None:
                    judge(where, f"{factor}x the list queue", "–", None)
                    continue
                gain = slow["p20_ms"] / fast["p20_ms"]
                judge(where, f"{factor}x the list queue", times(gain), gain >= factor)
                if factor == 100:
                    limit, took = 3 * fast["floor_p20_ms"] + 0.3, fast["p20_ms"]
                    judge(where, f"3 cross-entropy + 0.3 ms = {ms(limit)}", ms(took), took <= limit)
    small, large = (results.one("queue", peer="index", N=n, distribution="spread") for n in (20_000, 10_000_000))
    if small and large:
        growth = large["mean_ms"] / small["mean_ms"]
        judge("queue at N = 10,000,000", "4x its cost at 20,000", times(growth), growth <= 4)
    for r in results.find("linear"):
        limit = {"paper": 1.1, "released": 1.45}.get(r["peer"])
        if limit:
            where = f"`{r['peer']}` and last layer at {r['B']:,}, {r['C']:,}, {r['D']:,}"
            judge(where, f"{limit}x its three products", f"{r['ratio']:.2f}x", r["ratio"] <= limit)
    return table(("what", "limit", "measured", "met"), rows)
