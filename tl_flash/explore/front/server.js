// What the page asks its server: data by name, and jobs, whose events are followed and survive a lost connection.

source.coded = async (name) => {
  const answer = await fetch(`/data/${encodeURIComponent(name)}`);
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer.text();
};

async function post(address, asked = {}) {
  const answer = await fetch(address, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked),
  });
  const told = (answer.headers.get("Content-Type") ?? "").includes("json") ? await answer.json() : { why: await answer.text() };
  return answer.ok ? told : { why: told.why || `the server answered ${answer.status}` };
}

const OVER = new Set(["done", "failed", "cancelled"]);

/** Start a job; each of its events goes to the handler of its type. A refusal is told as a failure. */
async function startJob(kind, asked, handlers) {
  let told;
  try {
    told = await post(`/api/${kind}`, asked);
  } catch {
    told = { why: "the server does not answer; is it still running?" };
  }
  if (told.why) {
    handlers.failed?.({ why: told.why });
    return null;
  }
  if (told.ahead) handlers.waiting?.(told.ahead);
  return followJob(told.id, handlers);
}

function followJob(id, handlers) {
  const stream = new EventSource(`/api/jobs/${id}/events`); // asks again by itself, from the last event that it had
  stream.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    if (OVER.has(event.type)) stream.close();
    handlers[event.type]?.(event);
  };
  stream.onerror = () => {
    if (stream.readyState === EventSource.CLOSED) handlers.failed?.({ why: "the server has forgotten this job" });
    else handlers.lost?.();
  };
  return {
    cancel: () => post(`/api/jobs/${id}/cancel`),
    leave: () => { stream.close(); return post(`/api/jobs/${id}/cancel`); },
  };
}

const progressText = ({ what, done, total }) => (total ? `${what}: ${whole(done)} of ${whole(total)}` : `${what}: ${whole(done)} passes`);
