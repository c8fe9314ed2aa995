import sys

from sdworker.cli import app

if __name__ == "__main__":
    app(["start", *sys.argv[1:]])
