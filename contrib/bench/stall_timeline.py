"""Figures from a timeline that `blkclient bench --timeline` has written.

Times are nanoseconds of CLOCK_MONOTONIC, which is `time.monotonic_ns()` too. A gap is the time that
one queue was without a completion; it is filed under the millisecond in which it ended.
"""

import json
from pathlib import Path

MS = 1_000_000
SECOND = 1_000_000_000


class Timeline:
    """What completed when, in intervals of equal length."""

    def __init__(self, value):
        self.start = value["start_ns"]
        self.interval = value["interval_us"] * 1000
        self.first_completion = value["first_completion_ns"]
        self.completions = value["completions"]
        self.latency_us = value["latency_max_us"]
        self.gap_us = value["gap_max_us"]

    @classmethod
    def load(cls, file):
        return cls(json.loads(Path(file).read_text()))

    @property
    def end(self):
        return self.start + len(self.completions) * self.interval

    def index(self, moment):
        """The interval of a moment, at most one past the last."""
        return min(max((moment - self.start) // self.interval, 0), len(self.completions))

    def iops(self, start, end):
        """Completions a second between two moments; nothing for less than 100 ms."""
        first, last = self.index(start), self.index(end)
        if (last - first) * self.interval < 100 * MS:
            return None
        return sum(self.completions[first:last]) * SECOND / ((last - first) * self.interval)

    def gap_ended_ms(self, start, end):
        """The longest gap that ended between two moments."""
        return max(self.gap_us[self.index(start) : self.index(end)], default=0) / 1000

    def gap_ms(self, start, end):
        """The longest gap that touched the time between two moments."""
        longest = self.gap_ended_ms(start, end)
        # One that began in there may have ended later: not later than its own length.
        for index in range(self.index(end), len(self.gap_us)):
            gap = self.gap_us[index]
            if gap and self.start + index * self.interval - gap * 1000 <= end:
                longest = max(longest, gap / 1000)
                break
            if gap:
                break
        return longest

    def longest_gaps(self, start, end, zero, count=8):
        """The longest gaps that ended between two moments: (when it ended, how long), in ms, the
        former counted from `zero`, in the order of time."""
        window = range(self.index(start), self.index(end))
        worst = sorted(window, key=lambda index: self.gap_us[index], reverse=True)[:count]
        return [
            ((self.start + index * self.interval - zero) / MS, self.gap_us[index] / 1000)
            for index in sorted(worst)
        ]

    def ages_ms(self):
        """For each interval how old the oldest request is that completes in it, or, while nothing
        completes, how old the one is by then that completes next."""
        ages = [latency / 1000 for latency in self.latency_us]
        step = self.interval / MS
        for index in range(len(ages) - 2, -1, -1):
            if not self.completions[index]:
                ages[index] = max(ages[index + 1] - step, 0.0)
        return ages
