# shellcheck shell=bash
# grpc.sh - calls of gRPC with curl, for what no client at hand can say. Sourced, after common.sh.
#
# A message is written as hex digits, as the shell's strings hold no NUL. Its fields have numbers below
# 16 and are texts and messages: nothing here needs more.

# hex_of TEXT
hex_of() { printf %s "$1" | od -An -v -tx1 | tr -d ' \n'; }

# field NUMBER HEX: a text or a message as a field of another.
field() {
  local len=$((${#2} / 2)) out
  printf -v out %02x $(($1 * 8 + 2))
  while [ "$len" -ge 128 ]; do
    printf -v out %s%02x "$out" $((len % 128 + 128))
    len=$((len / 128))
  done
  printf %s%02x%s "$out" "$len" "$2"
}

# text NUMBER TEXT: the same of a text.
text() { field "$1" "$(hex_of "$2")"; }

# entry NUMBER KEY VALUE: one of a map of texts.
entry() { field "$1" "$(text 1 "$2")$(text 2 "$3")"; }

# call SOCKET SERVICE/METHOD MESSAGE [HEADER...]: succeeds if it does. CODE is gRPC's own, 0 for a success, or
# "none"; the messages of the answer are in $SCRATCH/answer as they came; says why it failed.
call() {
  local socket=$1 method=$2 header headers=(); printf -v header '00%08x%s' $((${#3} / 2)) "$3"
  # shellcheck disable=SC2001  # newer shells read an & of their own into the other way
  printf %b "$(sed 's/../\\x&/g' <<<"$header")" >"$SCRATCH/request"
  shift 3
  for header; do headers+=(-H "$header"); done
  curl -sS --noproxy '*' --http2-prior-knowledge --unix-socket "$socket" -D "$SCRATCH/headers" -o "$SCRATCH/answer" \
    -H 'content-type: application/grpc' -H 'te: trailers' "${headers[@]}" --data-binary "@$SCRATCH/request" \
    "http://localhost/$method" || true
  CODE=$(sed -nE 's/^grpc-status: *([0-9]+).*/\1/p' "$SCRATCH/headers")
  CODE=${CODE:-none}
  [ "$CODE" = 0 ] || { say "$method: $CODE $(sed -n 's/^grpc-message: *//p' "$SCRATCH/headers")"; return 1; }
}
