from sdworker.handler import start

start()
