-- A token that was rotated with a grace ends soon; its successor's end is measured from how long it was issued for. Rotated once more it would
-- hand on the grace instead, and its successor would die with it: so a token is rotated once.

ALTER TABLE public.api_tokens ADD COLUMN IF NOT EXISTS rotated_at timestamptz;
COMMENT ON COLUMN public.api_tokens.rotated_at IS 'When a successor took its place. It may live on for a grace, and is not rotated again.';
