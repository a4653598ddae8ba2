/**
 * Where a prompt says what its last line asks for: the beginnings of the longest runs of tokens that the line shares with
 * the text before it.
 *
 * @param prompt the tokens of the prompt
 * @param question where its last line begins
 * @returns positions in the prompt, ascending
 */
export function evidence(prompt: Int32Array, question: number): number[] {
  let longest = 1
  let places: number[] = []
  for (let place = 0; place < question; place++) {
    const length = longestRun(prompt, place, question)
    if (length > longest) [longest, places] = [length, []]
    if (length === longest) places.push(place)
  }
  return places
}

/** The longest run of tokens from `place` that is found anywhere in the question. */
function longestRun(prompt: Int32Array, place: number, question: number): number {
  let longest = 0
  for (let start = question; start < prompt.length; start++) {
    let length = 0
    while (start + length < prompt.length && place + length < question && prompt[start + length] === prompt[place + length]) length++
    longest = Math.max(longest, length)
  }
  return longest
}
