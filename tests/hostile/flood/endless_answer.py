"""Answers with a list of a list of a list, deeper than anybody can read."""


def solve(host):
    answer = []
    for _ in range(200_000):
        answer = [answer]
    return answer
