// Vercel's AI SDK, with its providers for OpenAI (responses and chat) and for compatible servers.
import assert from "node:assert/strict";
import { test } from "./checks.mjs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embed, embedMany, generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.env.ORIGIN}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({
  name: "llmserve",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  responses: openai("chat"),
  chat: openai.chat("chat"),
  compatible: compatible.chatModel("chat"),
};
const City = z.object({ name: z.enum(["Paris", "Rome"]), is_capital: z.boolean() });
const weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
});
const prompt = "What is the capital of France?";
const limits = { maxRetries: 0, maxOutputTokens: 200 };

for (const [name, model] of Object.entries(models)) {
  const ask = { ...limits, model, prompt };

  test(`${name} generateText`, async () => {
    const { text, finishReason, usage } = await generateText(ask);
    assert.match(text, /Paris/);
    assert.equal(finishReason, "stop");
    assert(usage.outputTokens > 0);
  });

  test(`${name} streamText`, async () => {
    const result = streamText({ ...ask, onError: () => {} });
    let text = "";
    for await (const piece of result.textStream) text += piece;
    assert.match(text, /Paris/);
    assert.equal(await result.finishReason, "stop");
    assert((await result.usage).outputTokens > 0);
  });

  test(`${name} generateObject`, async () => {
    const { object } = await generateObject({ ...ask, schema: City });
    City.parse(object);
  });

  test(`${name} streamObject`, async () => {
    const result = streamObject({ ...ask, schema: City, onError: () => {} });
    for await (const _ of result.partialObjectStream);
    City.parse(await result.object);
  });

  for (const [kind, toolChoice] of [
    ["required", "required"],
    ["named", { type: "tool", toolName: "weather" }],
  ]) {
    const forced = { ...ask, tools: { weather }, toolChoice, onError: () => {} };
    const check = ([call]) => {
      assert.equal(call.toolName, "weather");
      assert(["Paris", "Rome"].includes(call.input.city));
    };
    test(`${name} ${kind} tool`, async () => check((await generateText(forced)).toolCalls));
    test(`${name} ${kind} tool stream`, async () => {
      const result = streamText(forced);
      await result.consumeStream();
      check(await result.toolCalls);
    });
  }
}

for (const [name, model] of [
  ["openai", openai.textEmbeddingModel("embed")],
  ["compatible", compatible.textEmbeddingModel("embed")],
]) {
  test(`${name} embed`, async () => {
    const { embedding } = await embed({ model, value: "a", maxRetries: 0 });
    assert.equal(embedding.length, 384);
    const { embeddings } = await embedMany({ model, values: ["a", "b"], maxRetries: 0 });
    assert.equal(embeddings.length, 2);
  });
}

test("compatible completion", async () => {
  const model = compatible.completionModel("chat");
  const { text } = await generateText({ model, prompt: "One, two,", maxOutputTokens: 4, maxRetries: 0 });
  assert(text);
});

test("errors", async () => {
  await assert.rejects(generateText({ ...limits, model: compatible.chatModel("none"), prompt }), (error) => {
    assert(APICallError.isInstance(error));
    assert.equal(error.statusCode, 404);
    assert.equal(error.data.error.code, "model_not_found");
    return true;
  });
});
