-- What a hand may do: rotate a token, and judge a call by SQL.

-- A token that was rotated with a grace ends soon; its successor's end is measured from how long it was issued for. Rotated once more it would
-- hand on the grace instead, and its successor would die with it: so a token is rotated once.
ALTER TABLE public.api_tokens ADD COLUMN IF NOT EXISTS rotated_at timestamptz;
COMMENT ON COLUMN public.api_tokens.rotated_at IS 'When a successor took its place. It may live on for a grace, and is not rotated again.';

-- A sale that a dashboard writes is held to what the contract can show. No currency of ISO 4217 has more than four decimal places.
ALTER TABLE public.calls DROP CONSTRAINT IF EXISTS calls_sale_bounded;
ALTER TABLE public.calls ADD CONSTRAINT calls_sale_bounded
    CHECK (sale_amount IS NULL OR (sale_amount < 1000000000000 AND scale(trim_scale(sale_amount)) <= 4)) NOT VALID;

-- A judgement has a time, also when the hand that wrote it gave none.
CREATE OR REPLACE FUNCTION opsmantik.touch_call() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.updated_at := now();
    IF NEW.review IS DISTINCT FROM OLD.review AND NEW.reviewed_at IS NOT DISTINCT FROM OLD.reviewed_at THEN
        NEW.reviewed_at := now();
    END IF;
    RETURN NEW;
END
$$;
