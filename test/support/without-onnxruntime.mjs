// For `node --import`: onnxruntime-node is not installed.
import { register } from 'node:module'

const hook = `export async function resolve(name, context, next) {
  if (name !== 'onnxruntime-node') return next(name, context)
  throw Object.assign(new Error("Cannot find package 'onnxruntime-node'"), { code: 'ERR_MODULE_NOT_FOUND' })
}`
register(`data:text/javascript,${encodeURIComponent(hook)}`)
