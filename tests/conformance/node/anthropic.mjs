// Anthropic's TypeScript SDK.
import assert from "node:assert/strict";
import { test } from "./checks.mjs";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({
  baseURL: process.env.ORIGIN,
  apiKey: "none",
  maxRetries: 0,
  timeout: 120_000,
});
const messages = [{ role: "user", content: "What is the capital of France?" }];
const weather = {
  name: "weather",
  input_schema: {
    type: "object",
    properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
    required: ["city"],
  },
};
const ask = { model: "claude-haiku", max_tokens: 200, messages };

test("create", async () => {
  const answer = await client.messages.create(ask);
  assert.match(answer.content[0].text, /Paris/);
  assert.equal(answer.stop_reason, "end_turn");
});

test("stream helper", async () => {
  const stream = client.messages.stream(ask);
  assert.match(await stream.finalText(), /Paris/);
  assert((await stream.finalMessage()).usage.output_tokens > 0);
});

for (const type of ["any", "tool"]) {
  const forced = { ...ask, tools: [weather], tool_choice: type === "any" ? { type } : { type, name: "weather" } };
  const check = (message) => {
    const [call] = message.content.filter((block) => block.type === "tool_use");
    assert.equal(call.name, "weather");
    assert(["Paris", "Rome"].includes(call.input.city));
    assert.equal(message.stop_reason, "tool_use");
  };
  test(`tool choice ${type}`, async () => check(await client.messages.create(forced)));
  test(`tool choice ${type} stream`, async () =>
    check(await client.messages.stream(forced).finalMessage()));
}

test("count tokens", async () => {
  const counted = await client.messages.countTokens({ model: "chat", messages });
  assert(counted.input_tokens > 0);
});

test("models", async () => {
  const cards = [];
  for await (const card of client.models.list()) cards.push(card);
  assert(cards.some((card) => card.id === "chat"));
  assert(cards.every((card) => card.type === "model" && card.display_name));
});

test("errors", async () => {
  await assert.rejects(client.messages.create({ ...ask, model: "none" }), (error) => {
    assert(error instanceof Anthropic.NotFoundError);
    assert.equal(error.error.type, "error");
    assert.equal(error.error.error.type, "not_found_error");
    return true;
  });
});
