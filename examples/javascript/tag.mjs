// Tag one video with an exported ensemble, in ONNX Runtime for Node.js or in WebAssembly.
//
//     npm install --ignore-scripts     # the scripts would download libraries for CUDA
//     node tag.mjs ensemble.onnx video.json
//     node tag.mjs ensemble.onnx video.json --wasm
//
// video.json has the frames of each modality as lists of bytes: {"rgb": [[0, 255, ...], ...], ...}.
// The ensemble takes frames as bytes (an export without --input float32), of any precision.
import { readFile } from 'node:fs/promises'

const [modelPath, videoPath, ...flags] = process.argv.slice(2)
const isWasm = flags.includes('--wasm')
const { default: ort } = await import(isWasm ? 'onnxruntime-web' : 'onnxruntime-node')

const options = {
  executionProviders: [isWasm ? 'wasm' : 'cpu'],
  // How products of packed numbers are summed: 4 as OnnxEnsemble does, 1 exactly in float32
  extra: { session: { qdq_matmulnbits_accuracy_level: process.env.ACCURACY_LEVEL ?? '4' } },
}
const session = await ort.InferenceSession.create(await readFile(modelPath), options)

const video = JSON.parse(await readFile(videoPath, 'utf8'))
const feed = {}
let length = 0
for (const [modality, frames] of Object.entries(video)) {
  length = frames.length
  const width = length ? frames[0].length : 0
  feed[modality] = new ort.Tensor('uint8', Uint8Array.from(frames.flat()), [1, length, width])
}
feed.num_frames = new ort.Tensor('int64', BigInt64Array.of(BigInt(length)), [1])

const { probabilities, labels, confidences } = await session.run(feed)
console.log(JSON.stringify({
  labels: Array.from(labels.data, Number),
  confidences: Array.from(confidences.data),
  probabilities: Array.from(probabilities.data),
}))
