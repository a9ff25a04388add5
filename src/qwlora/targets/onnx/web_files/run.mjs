// Runs a base of target `web` in node for `verify`: `node run.mjs ONNXRUNTIME_WEB BASE THREADS`.
//
// Each line of input asks {adapter: file, ids: [...], count, follows}. The answer is a line of JSON,
// and for count 0 then the float32 logits of all ids, which may follow those of the last question;
// else it has the `count` likeliest next tokens.

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { Model, readSafetensors } from "./model.mjs";

console.log = console.error; // output is for answers

const [, , library, base, threads] = process.argv;
const ort = createRequire(import.meta.url)(library);
ort.env.logLevel = "fatal";
ort.env.wasm.numThreads = Number(threads);
const adapters = new Map(); // they stay loaded
let model, kept;

async function answer({ adapter, ids, count, follows }) {
  model ??= await Model.load(ort, async (name) => new Uint8Array(await readFile(join(base, name))));
  if (!adapters.has(adapter))
    adapters.set(adapter, readSafetensors(ort, new Uint8Array(await readFile(adapter))));
  const tensors = adapters.get(adapter);
  if (!count) {
    const { logits, cache } = await model.run(ids, tensors, follows ? kept : undefined);
    kept = cache;
    const { buffer, byteOffset, byteLength } = logits.data;
    return [{ shape: logits.dims }, Buffer.from(buffer, byteOffset, byteLength)];
  }
  const tokens = [];
  for await (const token of model.generate(ids, tensors)) {
    tokens.push(token);
    if (tokens.length === count) break;
  }
  return [{ tokens }];
}

for await (const line of createInterface({ input: process.stdin })) {
  let result;
  try {
    result = await answer(JSON.parse(line));
  } catch (error) {
    result = [{ error: String(error?.message ?? error) }];
  }
  const [header, bytes] = result;
  header.peak_bytes = process.resourceUsage().maxRSS * 1024;
  process.stdout.write(`${JSON.stringify(header)}\n`);
  if (bytes) process.stdout.write(bytes);
}
process.exit(0); // also ends the threads of ONNX Runtime
