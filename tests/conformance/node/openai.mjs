// openai-node.
import assert from "node:assert/strict";
import { test } from "./checks.mjs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({
  baseURL: `${process.env.ORIGIN}/v1`,
  apiKey: "none",
  maxRetries: 0,
  timeout: 120_000,
});
const messages = [{ role: "user", content: "What is the capital of France?" }];
const City = z.object({ name: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "weather", parameters, strict: true } };

test("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert(names.includes("chat") && names.includes("embed"));
});

test("chat", async () => {
  const answer = await client.chat.completions.create({ model: "chat", messages });
  assert.match(answer.choices[0].message.content, /Paris/);
  assert(answer._request_id);
});

test("chat stream", async () => {
  const stream = await client.chat.completions.create({ model: "chat", messages, stream: true });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
  assert.match(text, /Paris/);
});

test("chat stream helper", async () => {
  const stream = client.chat.completions.stream({
    model: "chat",
    messages,
    stream_options: { include_usage: true },
  });
  assert.match(await stream.finalContent(), /Paris/);
  assert((await stream.totalUsage()).completion_tokens > 0);
});

test("chat stream aborted", async () => {
  const stream = await client.chat.completions.create({
    model: "chat",
    messages: [{ role: "user", content: "Tell a long story." }],
    stream: true,
  });
  for await (const _ of stream) break;
  assert(stream.controller.signal.aborted);
});

test("parse", async () => {
  const answer = await client.chat.completions.parse({
    model: "chat",
    messages,
    response_format: zodResponseFormat(City, "city"),
  });
  City.parse(answer.choices[0].message.parsed);
});

for (const [name, tool_choice] of [
  ["required tool", "required"],
  ["named tool", { type: "function", function: { name: "weather" } }],
]) {
  test(name, async () => {
    const body = { model: "chat", messages, tools: [weather], tool_choice };
    const answer = await client.chat.completions.create(body);
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "weather");
    assert(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));
  });

  test(`${name} stream`, async () => {
    const stream = client.chat.completions.stream({
      model: "chat",
      messages,
      tools: [weather],
      tool_choice,
    });
    const call = await stream.finalFunctionToolCall();
    assert.equal(call.name, "weather");
    assert(["Paris", "Rome"].includes(JSON.parse(call.arguments).city));
  });
}

test("completions", async () => {
  const answer = await client.completions.create({ model: "chat", prompt: "One, two,", max_tokens: 4 });
  assert(answer.choices[0].text);
});

test("embeddings", async () => {
  // The SDK asks for base64 and unpacks it.
  const answer = await client.embeddings.create({ model: "embed", input: ["a", "b"] });
  assert.deepEqual(answer.data.map((row) => row.embedding.length), [384, 384]);
});

test("responses", async () => {
  const made = await client.responses.create({
    model: "chat",
    input: "What is the capital of France?",
  });
  assert.match(made.output_text, /Paris/);
  assert.equal((await client.responses.retrieve(made.id)).id, made.id);
});

test("responses stream helper", async () => {
  const stream = client.responses.stream({ model: "chat", input: "What is the capital of France?" });
  const final = await stream.finalResponse();
  assert.match(final.output_text, /Paris/);
});

test("errors", async () => {
  await assert.rejects(client.chat.completions.create({ model: "none", messages }), (error) => {
    assert(error instanceof OpenAI.NotFoundError);
    assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
    return true;
  });
});
