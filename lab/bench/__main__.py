"""The process of one restart: a task as JSON on standard input, its rows as the last line of standard output."""

import json
import sys

from lab.bench.runner import measure_here

if __name__ == "__main__":
    print(json.dumps(measure_here(json.load(sys.stdin))))
