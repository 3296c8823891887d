"""Components that settings name, and warnings that pop up."""

warned = []


class Radio:
    pass


class Number:
    pass


def Warning(message):
    warned.append(message)
