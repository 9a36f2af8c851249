#!/usr/bin/env python3
"""Tests of stall_timeline.py and of the pictures, on timelines made by hand."""

import sys
import unittest
import xml.etree.ElementTree as ElementTree

sys.dont_write_bytecode = True

from stall_picture import gap_picture, timeline_picture
from stall_timeline import MS, SECOND, Timeline

START = 1000 * SECOND


def timeline(completions, latency_us=None, gap_us=None):
    return Timeline({
        "start_ns": START,
        "interval_us": 1000,
        "first_completion_ns": START,
        "completions": completions,
        "latency_max_us": latency_us or [0] * len(completions),
        "gap_max_us": gap_us or [0] * len(completions),
    })  # fmt: skip


def at(milliseconds):
    return START + milliseconds * MS


class Figures(unittest.TestCase):
    def test_rate_is_of_the_window_and_not_of_a_short_one(self):
        line = timeline([1] * 100 + [3] * 200)
        self.assertEqual(line.iops(at(0), at(100)), 1000)
        self.assertEqual(line.iops(at(50), at(150)), 2000)
        self.assertIsNone(line.iops(at(0), at(99)))

    def test_gap_that_spans_the_window_belongs_to_it(self):
        gaps = [0] * 100
        gaps[10], gaps[90] = 3000, 70_000  # from 7 to 10, from 20 to 90
        line = timeline([1] * 100, gap_us=gaps)
        self.assertEqual(line.gap_ms(at(30), at(40)), 70)
        self.assertEqual(line.gap_ended_ms(at(30), at(40)), 0)
        self.assertEqual(line.gap_ms(at(8), at(9)), 3)

    def test_gap_after_the_window_does_not_belong_to_it(self):
        gaps = [0] * 100
        gaps[10], gaps[90] = 3000, 70_000
        line = timeline([1] * 100, gap_us=gaps)
        self.assertEqual(line.gap_ms(at(5), at(15)), 3)
        self.assertEqual(line.gap_ended_ms(at(0), at(90)), 3)

    def test_request_ages_while_nothing_completes(self):
        ages = timeline([1, 0, 0, 1], latency_us=[100, 0, 0, 3000]).ages_ms()
        self.assertEqual(ages, [0.1, 1.0, 2.0, 3.0])

    def test_window_outside_of_the_time_line_is_empty(self):
        line = timeline([1] * 10)
        self.assertIsNone(line.iops(at(-500), at(-100)))
        self.assertEqual(line.gap_ms(at(20), at(30)), 0)


class Pictures(unittest.TestCase):
    def test_pictures_are_well_formed(self):
        line = timeline([1] * 3000, latency_us=[100] * 3000)
        marks = [("create", at(1000)), ("answer", at(1001)), ("delete", at(2000))]
        panels = [("a < b", "ours", line, marks), ("other", "theirs", line, marks)]
        root = ElementTree.fromstring(timeline_picture("one & two", "where", panels))
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        for wanted in ("one & two", "a < b", "create", "answer", "delete", "100 ms", "0", "1"):
            self.assertIn(wanted, texts)
        series = [("ours", "ours", False, [1.0, None, 3.0]), ("none", "theirs", True, [None] * 3)]
        root = ElementTree.fromstring(gap_picture("gaps", "where", ["1", "2", "3"], series))
        circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
        self.assertEqual(len(circles), 2)


if __name__ == "__main__":
    unittest.main()
