from sdworker.handler import start

if __name__ == "__main__":
    start()
