"""How many profile requests a fleet saves by asking only for what it does not know.

    python benchmarks/profile_fleet.py [--users N] [--cold SHARE] [--incomplete SHARE]

A client that asks for the profile at each refresh sends one such request for every
refresh. This module asks only if its account file or credential lacks a field. What one
refresh then costs is not assumed: the real OAuthService refreshes against a Sandbox,
warm, cold (no account file) and incomplete (the profile is refused), and the requests
are counted. The fleet is arithmetic on top of that: how many users are of which kind.
"""

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CLAIM = 7_000_000
"""Requests saved a day, as published for the same rule in another client."""

HOURS_BETWEEN = 8 - 300 / 3600
"""A token lives for 8 hours and is refreshed 5 minutes before its end."""

KINDS = {
    "an hour or two a day": (0.4, (1, 2)),
    "a working day": (0.4, (7, 11)),
    "around the clock": (0.2, (24, 24)),
}
"""Share of the users, and between how many hours a day they are active: assumed."""

SAMPLE = 100_000
REFRESHES = 25


def count_requests(state):
    """Profile requests at the first refresh and, on average, at each later one."""
    import claude_oauth

    with tempfile.TemporaryDirectory() as directory, claude_oauth.Sandbox() as sandbox:
        storage = claude_oauth.FileStorage(os.path.join(directory, "credentials.json"))
        service = claude_oauth.OAuthService(sandbox.config, storage)
        with contextlib.redirect_stderr(io.StringIO()):  # the address, for a person
            service.login(open_browser=sandbox.approve, paste=False)
        if state != "warm":
            os.remove(os.path.join(directory, "account.json"))
        counts = []
        for _ in range(1 + REFRESHES):
            if state == "incomplete":
                sandbox.fail_next("profile", status=403)
            before = sandbox.counts["profile"]
            service.refresh()
            counts.append(sandbox.counts["profile"] - before)
    return counts[0], sum(counts[1:]) / REFRESHES


def refreshes_a_day(draw):
    """One when the day's work begins, then one whenever the token is near its end."""
    parts = [part for part, _ in KINDS.values()]
    ((_, hours_active),) = draw.choices(list(KINDS.values()), parts)
    hours = draw.uniform(*hours_active)
    if hours == 24:
        return 24 / HOURS_BETWEEN
    return 1 + int(hours / HOURS_BETWEEN)


def simulate(users, cold, incomplete, costs):
    """Requests a day of the whole fleet, scaled up from a sample of its users."""
    draw = random.Random(1)
    refreshes = sent = 0.0
    for _ in range(SAMPLE):
        count = refreshes_a_day(draw)
        share = draw.random()
        if share < incomplete:
            state = "incomplete"
        else:
            state = "cold" if share < incomplete + cold else "warm"
        first, later = costs[state]
        refreshes += count
        sent += first + later * (count - 1)
    scale = users / SAMPLE
    return {
        "users": users,
        "without": refreshes * scale,
        "with": sent * scale,
        "saved": (refreshes - sent) * scale,
    }


def tell(result):
    costs = result["costs"]
    print("Profile requests at the first refresh, and at each later one (counted):")
    for state, (first, later) in costs.items():
        print(f"    {state:<11}{first:>3}{later:>6.2f}")
    fleet = result["fleet"]
    share = fleet["saved"] / fleet["without"]
    print(f"\nA day of {fleet['users']:,} users, {result['assumed']}:")
    print(f"    asking at each refresh     {fleet['without']:>12,.0f}")
    print(f"    asking for what is missing {fleet['with']:>12,.0f}")
    print(f"    saved                      {fleet['saved']:>12,.0f}   {share:.1%}")
    print(
        f"\nThe published {CLAIM:,} a day is what {result['users_of_claim']:,.0f} such"
        " users save."
    )
    print("\nWith more cold caches, in the same fleet:")
    for cold, row in result["by_cold"]:
        print(f"    {cold:>4.0%} cold a day   {row['saved']:>12,.0f} saved")


def main():
    parser = argparse.ArgumentParser(description="Profile requests of a fleet.")
    parser.add_argument("--users", type=int, default=4_000_000)
    parser.add_argument("--cold", type=float, default=0.02, metavar="SHARE")
    parser.add_argument("--incomplete", type=float, default=0.01, metavar="SHARE")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    costs = {state: count_requests(state) for state in ("warm", "cold", "incomplete")}

    def fleet(cold):
        return simulate(chosen.users, cold, chosen.incomplete, costs)

    usual = fleet(chosen.cold)
    result = {
        "costs": costs,
        "assumed": f"{chosen.cold:.0%} cold, {chosen.incomplete:.0%} incomplete",
        "fleet": usual,
        "claim": CLAIM,
        "users_of_claim": CLAIM * chosen.users / usual["saved"],
        "by_cold": [(cold, fleet(cold)) for cold in (0.0, 0.1, 0.25, 0.5)],
    }
    if chosen.json:
        json.dump(result, sys.stdout)
    else:
        tell(result)


if __name__ == "__main__":
    main()
