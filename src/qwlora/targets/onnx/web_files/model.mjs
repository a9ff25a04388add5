// A base of target `web` and its adapters in ONNX Runtime Web, in a page as in node.
//
// Every input is given in every call: tokens, mask, positions, the cache of keys and values,
// and lora_A [in, r] and lora_B [r, out] of each linear layer. Their ranks may differ between
// layers and adapters; with rank 0, from none.safetensors, the model is the base.

export const NO_ADAPTER = "none.safetensors";

// The tensors of a safetensors file by name. All are float32.
export function readSafetensors(ort, bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  delete header.__metadata__;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}, not F32`);
    const copied = new Uint8Array(bytes.subarray(start + begin, start + end)); // aligned
    tensors[name] = new ort.Tensor("float32", new Float32Array(copied.buffer), shape);
  }
  return tensors;
}

// The place of the largest number.
export function likeliest(numbers) {
  let best = 0;
  for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[best]) best = i;
  return best;
}

export class Model {
  // `read` returns the bytes of a file of the base.
  static async load(ort, read) {
    const [graph, data] = await Promise.all([read("model.onnx"), read("model.onnx.data")]);
    const session = await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"], // float32, as it was proven
      externalData: [{ path: "model.onnx.data", data }],
    });
    return new Model(ort, session);
  }

  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
  }

  // A cache without tokens.
  emptyCache() {
    const cache = {};
    for (const { name, shape } of this.session.inputMetadata) {
      if (!name.startsWith("past_key_values.")) continue;
      const [, heads, , width] = shape; // [batch, heads, past tokens, width]
      cache[name] = new this.ort.Tensor("float32", new Float32Array(0), [1, heads, 0, width]);
    }
    return cache;
  }

  // Logits [1, tokens, vocabulary] of new tokens, and the cache with them.
  async run(ids, adapter, cache = this.emptyCache()) {
    const past = Object.values(cache)[0].dims[2];
    const integers = (length, valueAt) =>
      new this.ort.Tensor("int64", BigInt64Array.from({ length }, (_, i) => BigInt(valueAt(i))), [1, length]);
    const { logits, ...present } = await this.session.run({
      input_ids: integers(ids.length, (i) => ids[i]),
      attention_mask: integers(past + ids.length, () => 1),
      position_ids: integers(ids.length, (i) => past + i),
      ...cache,
      ...adapter,
    });
    const next = {};
    for (const [name, tensor] of Object.entries(present))
      next[name.replace("present.", "past_key_values.")] = tensor;
    return { logits, cache: next };
  }

  // The likeliest token, then the likeliest after it, and so on.
  async *generate(ids, adapter) {
    let cache;
    for (;;) {
      const result = await this.run(ids, adapter, cache);
      const vocabulary = result.logits.dims[2];
      cache = result.cache;
      ids = [likeliest(result.logits.data.subarray(-vocabulary))];
      yield ids[0];
    }
  }
}
