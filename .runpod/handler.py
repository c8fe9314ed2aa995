import sys

from sdworker.cli.main import app

if __name__ == "__main__":
    app(["start", *sys.argv[1:]])
