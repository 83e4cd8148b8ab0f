// A line of JSON per test: what test_node.py reads.
export default async function* reporter(events) {
  for await (const { type, data } of events) {
    if (type !== "test:pass" && type !== "test:fail") continue;
    const error = data.details?.error;
    const text = error && [error.cause?.stack ?? error.message, JSON.stringify(error.cause)].join("\n");
    yield JSON.stringify({ name: data.name, failure: type === "test:fail" ? text : null }) + "\n";
  }
}
