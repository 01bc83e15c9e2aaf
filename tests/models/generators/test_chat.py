"""The chat proposer against a real HTTP server on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from models.errors import StageFailed, UsageError
from models.generators.chat import Chat, captions, question
from models.generators.words import class_words


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the next of `server.replies`: a caption list, or a status code."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        reply = self.server.replies.pop(0)
        if isinstance(reply, int):
            self.send_error(reply)
            return
        content = reply
        if isinstance(reply, str):
            content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.asked, server.replies = [], []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def chat(server, tmp_path):
    return Chat(f"http://127.0.0.1:{server.server_port}/v1", "tiny", tmp_path / "replies", key="secret", retries=2)


def test_captions_come_numbered_from_the_turn(server, chat):
    server.replies.append('["A car by a river.", "Two  cars\\nin rain."]')
    found = chat.propose(class_words("car"), 8, 3)
    assert [(c.text, c.index) for c in found] == [("A car by a river.", 24), ("Two cars in rain.", 25)]
    path, key, body = server.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "tiny" and body["seed"] == 3 and '"car"' in body["messages"][1]["content"]


def test_a_question_is_asked_once_and_another_one_again(server, chat):
    server.replies += ['["A car."]', '["A red car."]', '["An old car."]']
    first = chat.propose(class_words("car"), 4, 0)
    assert chat.propose(class_words("car"), 4, 0) == first and len(server.asked) == 1
    chat.propose(class_words("car"), 4, 1)
    chat.propose(class_words("car"), 4, 0, accepted=["A car."])
    assert len(server.asked) == 3 and "A car." in server.asked[2][2]["messages"][1]["content"]


def test_kept_replies_need_no_server(server, chat, tmp_path):
    server.replies.append('["A car."]')
    first = chat.propose(class_words("car"), 4, 0)
    again = Chat("http://127.0.0.1:9/v1", "tiny", tmp_path / "replies", retries=1)
    assert again.propose(class_words("car"), 4, 0) == first
    with pytest.raises(StageFailed, match="use the grammar"):
        again.propose(class_words("car"), 4, 1)


def test_a_busy_server_is_asked_again(server, chat):
    server.replies += [503, '["A car."]']
    assert chat.propose(class_words("car"), 4, 0)[0].text == "A car."
    server.replies += [429, 500]
    with pytest.raises(StageFailed, match="500"):
        chat.propose(class_words("car"), 4, 1)


def test_a_refusal_names_the_reason_and_is_not_kept(server, chat, tmp_path):
    server.replies += [401]
    with pytest.raises(UsageError, match="401"):
        chat.propose(class_words("car"), 4, 0)
    assert not (tmp_path / "replies").exists() and len(server.asked) == 1


def test_an_answer_that_is_no_completion_is_not_kept(server, chat, tmp_path):
    server.replies += [b'{"error": "no such model"}', '["A car."]']
    with pytest.raises(StageFailed, match="no chat completion"):
        chat.propose(class_words("car"), 4, 0)
    assert chat.propose(class_words("car"), 4, 0)[0].text == "A car."


def test_no_captions_end_the_bank(server, chat):
    server.replies.append("[]")
    assert chat.propose(class_words("car"), 4, 0) is None


@pytest.mark.parametrize("reply", [
    '["A.", "B."]', '```json\n["A.", "B."]\n```', "1. A.\n2) B.\n", '- "A."\n- "B."', "A.\n\nB.",
])
def test_captions_are_read_from_what_models_write(reply):
    assert captions(reply) == ["A.", "B."]


def test_what_is_no_list_of_sentences_gives_nothing():
    assert captions('{"a": 1}') == [] and captions('["A.", 3, ""]') == ["A."]


def test_a_misleading_name_is_explained():
    assert "not the animal" in question(class_words("mouse"), 4, (), ())
