"""A model server of known latency that keeps a log of its calls.

    model.py PORT MEDIAN_MS SIGMA SLOW_SHARE SLOW_MS

The latency of a call depends on the number of its request alone, so that all contenders meet the same ones: log-normal
around the median, or SLOW_MS for the given share. A call's request is told by the "(n-17)" at the end of its question.

Invariant: every call that was received whole is in the log, with the time until its answer was written or its
connection was lost.
"""

import asyncio, json, random, re, sys, time

import uvloop

port, median, sigma, slow_share, slow = int(sys.argv[1]), *(float(word) for word in sys.argv[2:6])
dice = random.Random(20)
latencies = [slow if dice.random() < slow_share else median * dice.lognormvariate(0, sigma) for _ in range(8192)]
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
NUMBER = re.compile(rb"\(n-(\d+)\)")
BODY = json.dumps({
    "id": "c", "object": "chat.completion", "created": 0, "model": "fixed",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": "It stands in the first source of this answer [1]."}}],
    "usage": {"prompt_tokens": 1500, "completion_tokens": 12, "total_tokens": 1512},
}).encode()


def response(body):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


ANSWER = response(BODY)
calls = []  # [number, received, ended, whether answered]
answered = set()


class Connection(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.read, self.call = transport, bytearray(), None

    def data_received(self, data):
        self.read += data
        end = self.read.find(b"\r\n\r\n")
        if end < 0:
            return
        length = LENGTH.search(self.read, 0, end)
        whole = end + 4 + (int(length[1]) if length else 0)
        if len(self.read) < whole:
            return
        # No client here sends its next request before it has its answer.
        request, self.read = self.read, bytearray()
        if request.startswith(b"POST"):
            number = int(NUMBER.search(request, request.rindex(b"(n-"))[1])
            self.call = [number, time.monotonic(), 0.0, False]
            calls.append(self.call)
            latency = latencies[number % len(latencies)] / 1000
            if latency:
                asyncio.get_running_loop().call_later(latency, self.answer)
            else:
                self.answer()
        elif request.startswith(b"GET /log"):
            self.transport.write(response(json.dumps(calls).encode()))
        else:
            self.transport.write(response(b'{"calls": %d, "answered": %d}' % (len(calls), len(answered))))

    def answer(self):
        if self.call:
            self.transport.write(ANSWER)
            answered.add(self.call[0])
            self.call[2:], self.call = [time.monotonic(), True], None

    def connection_lost(self, _):
        if self.call:
            self.call[2], self.call = time.monotonic(), None


async def serve():
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


uvloop.run(serve())
