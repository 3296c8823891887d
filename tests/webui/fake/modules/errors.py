"""Faults that the WebUI printed and went on from."""

shown = []


def display(e, task, *, full_traceback=False):
    shown.append((task, e))


def report(message, *, exc_info=False):
    shown.append((message, None))
